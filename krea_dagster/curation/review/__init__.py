"""Review: a local web page for keeping, rejecting and flagging images."""
