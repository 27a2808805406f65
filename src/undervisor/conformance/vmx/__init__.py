"""Guest tests of VMX, a module per aspect; the modules of `svm` have the same names."""
