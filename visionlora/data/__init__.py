"""Pictures and captions: from a folder on disk to checked items."""
