"""Images, videos with sound, and heat maps: files in and out."""
