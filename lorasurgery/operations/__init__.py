"""Operations: what a command does, as one library function each."""
