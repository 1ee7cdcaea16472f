"""Time to quality: recipes trained for equal processor seconds and judged alike, beside the common one by diffusers."""
