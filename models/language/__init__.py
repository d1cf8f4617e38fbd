"""The language models, one file each, and sampling from them."""
