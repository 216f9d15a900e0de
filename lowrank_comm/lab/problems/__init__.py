"""Small problems whose solution is known, on which the papers' claims are checked."""
