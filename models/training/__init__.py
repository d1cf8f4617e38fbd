"""Training: a loop for any network, exact resume, and the segmentation networks' task."""
