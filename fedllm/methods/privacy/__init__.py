"""Privacy and security - the survey's section 2.2."""
