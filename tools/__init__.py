"""Files into other files: convert, quantize, prune, evaluate."""
