"""Model heterogeneity and personalisation - the survey's sections 2.1 and 3.6."""
