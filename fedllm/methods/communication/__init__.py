"""Methods of communication efficiency (survey 2.3)."""
