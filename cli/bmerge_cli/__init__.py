"""The command line of `mergekit_bayes`: parse, call one verb, render."""
