"""Parameter efficiency - the survey's section 2.3."""
