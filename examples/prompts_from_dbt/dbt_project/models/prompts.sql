select
    lower(c || '-' || s) as prompt_id,
    'a ' || s || ' in ' || c || ', early morning' as prompt,
    '16:9' as size,
    c as city
from places
