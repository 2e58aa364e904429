"""Future directions - the survey's sections 4.1 to 4.5."""
