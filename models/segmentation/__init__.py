"""The segmentation networks, one file each."""
