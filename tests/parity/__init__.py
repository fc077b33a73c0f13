"""Golden numbers of the two published implementations, and the generator of every weight and input behind them."""
