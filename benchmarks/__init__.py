"""What defend costs; see README.md."""
