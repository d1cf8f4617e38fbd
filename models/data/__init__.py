"""Data sets and augmentation for segmentation."""
