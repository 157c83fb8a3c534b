"""What a run needs of the machine, the disk, the model and the data, checked before it loads anything."""
