"""What must always be true, and how decisions are asked."""
