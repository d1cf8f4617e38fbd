"""Data sets, texts and augmentation."""
