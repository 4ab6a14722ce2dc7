"""What several eigensolvers share."""
