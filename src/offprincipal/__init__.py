"""offprincipal: what did post-training do to the weights: geometry, precision, or step length?"""
