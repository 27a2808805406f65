"""Guest tests of SVM, a module per aspect; the modules of `vmx` have the same names."""
