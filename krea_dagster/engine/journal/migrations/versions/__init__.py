"""The revisions of the journal's tables, each as it was when it was released."""
