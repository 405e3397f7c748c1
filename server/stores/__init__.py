"""Where objects are kept: bytes by key, for drivers that cut an image into many."""
