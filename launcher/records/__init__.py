"""What a run, a comparison or a preview measured: plain frozen data."""
