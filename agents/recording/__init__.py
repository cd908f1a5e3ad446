"""Has Ray workers decode documents into a trace store, and reads recordings back."""
