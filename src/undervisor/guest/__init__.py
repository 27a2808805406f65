"""What runs inside a machine: assembled code, images and how they start, the probe."""
