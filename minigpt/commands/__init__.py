"""The verbs besides the tutorial's five scripts, each thin: parse, call one function, print."""
