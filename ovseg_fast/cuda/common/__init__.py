"""What the CUDA C++ launchers of several operators share."""
