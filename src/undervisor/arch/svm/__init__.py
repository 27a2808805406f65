"""AMD SVM as the APM writes it, volume 2, "Secure Virtual Machine" and appendices B and C."""
