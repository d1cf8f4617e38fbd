"""Training: a loop for any network, exact resume, and a task for each kind of network."""
