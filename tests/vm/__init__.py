"""Virtual machines with other kernels: this machine's files, that kernel, nothing of it written back."""
