"""The backends: one file per kind of device, with the limits of its kernels."""
