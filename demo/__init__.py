"""The demo: a language model, a photograph, digits, a network in training and a decoder, through methods looked up by name."""
