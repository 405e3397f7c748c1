"""Where the bytes of an export are kept."""
