"""Small students, their tasks, and the arms that post-train them."""
