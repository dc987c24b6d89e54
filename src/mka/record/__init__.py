"""What a run is asked to do, and the record it leaves behind, in plain Python. No torch
here."""
