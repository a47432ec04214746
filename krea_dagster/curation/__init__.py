"""What is done with finished images: measured, compared, reviewed, accepted, handed on."""
