"""Parts that several eigensolvers share."""
