"""Images nobody was scanned for: the phantom and lesions."""
