"""How each kind of case is checked and measured."""
