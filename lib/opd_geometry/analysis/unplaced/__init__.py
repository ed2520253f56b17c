"""What an update without place gives, and what a placed one would have shown."""
