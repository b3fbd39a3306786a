"""File formats: where each tensor of a file lies. Readers give an index without reading tensor contents."""
