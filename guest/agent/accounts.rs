//! Users and groups as `/etc/passwd` and `/etc/group` list them. No system calls: tested on the host, too.

/// Most groups of a user.
pub(crate) const GROUPS_MAX: usize = 64;

/// A line of `/etc/passwd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: &'a [u8],
    pub(crate) shell: &'a [u8],
}

/// The user of this name.
pub(crate) fn account<'a>(passwd: &'a [u8], name: &[u8]) -> Option<Account<'a>> {
    lines(passwd).filter_map(read).find(|account| account.name == name)
}

/// The first user with this number.
pub(crate) fn account_of<'a>(passwd: &'a [u8], uid: u32) -> Option<Account<'a>> {
    lines(passwd).filter_map(read).find(|account| account.uid == uid)
}

/// The user's groups, its own first. Gives how many there are in `groups`.
pub(crate) fn groups(group: &[u8], account: &Account, groups: &mut [u32; GROUPS_MAX]) -> usize {
    groups[0] = account.gid;
    let mut count = 1;
    for line in lines(group) {
        let mut fields = fields(line);
        let (gid, members) = (fields.nth(2).and_then(number), fields.next().unwrap_or_default());
        let Some(gid) = gid else { continue };
        let is_member = members.split(|byte| *byte == b',').any(|member| member == account.name);
        if is_member && count < GROUPS_MAX && !groups[..count].contains(&gid) {
            groups[count] = gid;
            count += 1;
        }
    }
    count
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#"))
}

fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b':')
}

fn number(digits: &[u8]) -> Option<u32> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}

fn read(line: &[u8]) -> Option<Account<'_>> {
    let mut fields = fields(line);
    let name = fields.next().filter(|name| !name.is_empty())?;
    let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
    Some(Account { name, uid, gid, home: fields.nth(1)?, shell: fields.next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"# $FreeBSD$\n#\nroot:*:0:0:Charlie &:/root:/bin/sh\ntoor:*:0:0:Bourne:/root:\n\
        broken:*:x:0::/:\n:*:7:7::/:\nwww:*:80:80:World Wide Web Owner:/nonexistent:/usr/sbin/nologin\n";
    const GROUP: &[u8] = b"wheel:*:0:root\n# c\nstaff:*:20:root,www\nwww:*:80:\nvideo:*:44:www,www\nbad:*:x:www\nmail:*:6:wwwx\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let root = Account { name: b"root", uid: 0, gid: 0, home: b"/root", shell: b"/bin/sh" };
        assert_eq!(account(PASSWD, b"root"), Some(root));
        assert_eq!(account_of(PASSWD, 0), Some(root));
        assert_eq!(account(PASSWD, b"toor").unwrap().shell, b"");
        for none in [&b"broken"[..], b"", b"# $FreeBSD$", b"roo"] {
            assert_eq!(account(PASSWD, none), None);
        }
        assert_eq!(account_of(PASSWD, 7), None, "a line without a name");
    }

    #[test]
    fn a_users_own_group_comes_first_and_none_twice() {
        let mut into = [0; GROUPS_MAX];
        let www = account(PASSWD, b"www").unwrap();
        let count = groups(GROUP, &www, &mut into);
        assert_eq!(into[..count], [80, 20, 44]);
        let long: Vec<u8> = (0..200).flat_map(|gid| format!("g{gid}:*:{gid}:www\n").into_bytes()).collect();
        assert_eq!(groups(&long, &www, &mut into), GROUPS_MAX);
    }
}
