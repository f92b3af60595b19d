"""Classification of images and recordings, with one label or several."""
