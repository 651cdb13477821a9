"""A cluster of nodes in virtual time, under the policies of the daemon."""
