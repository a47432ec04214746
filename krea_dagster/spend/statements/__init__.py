"""The statements of closed months: what each says, its file and its page."""
