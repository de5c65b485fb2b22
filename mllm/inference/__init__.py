"""Using a trained model: load any stage's folder, generate, chat in a terminal."""
