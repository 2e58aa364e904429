"""Tasks - what is learned: rows to examples, loss, counts."""
