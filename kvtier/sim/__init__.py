"""What if: recorded load replayed against policies. Needs the extra `sim`."""
