package workload

import (
	"fmt"
)

func openldap() Engine {
	const suffix = "dc=example,dc=com"
	// The password goes through a descriptor: arguments can be seen by everybody.
	run := func(program string, port int) []string {
		return []string{"bash", "-c", fmt.Sprintf(`exec stdbuf -oL %s -x -H ldap://127.0.0.1:%d -D cn=admin,%s -y <(printf %%s "$LDAP_PASSWORD")`,
			program, port, suffix)}
	}
	return Engine{
		Name: "openldap", Image: "dbsupervisor/openldap:2", Port: 389,
		Env: "LDAP_SUFFIX=" + suffix + "\nLDAP_ADMIN_PASSWORD=%s", Password: "LDAP_PASSWORD",
		Client: func(port int) []string { return run("ldapmodify -v", port) },
		Write: func(n int64) string {
			return fmt.Sprintf("dn: cn=%d,%s\nchangetype: add\nobjectClass: device\ncn: %d\n\n", n, suffix, n)
		},
		Acked:  func(line string, _ int64) bool { return line == "modify complete" },
		Reader: func(port int) []string { return run("ldapsearch -LLL -b "+suffix+" objectClass=device cn", port) },
		// Every page is walked and every entry decoded.
		DataPath: "/var/lib/ldap",
		Check: `mkdir /tmp/copy
mdb_copy -c . /tmp/copy
mdb_stat -e -a . >/tmp/stat
LDAP_SUFFIX=` + suffix + ` LDAP_ADMIN_PASSWORD=x docker-entrypoint.sh slapd -VV >/dev/null 2>&1 || true
slapschema -f /etc/ldap/slapd.conf
slapcat -f /etc/ldap/slapd.conf >/tmp/ldif
echo "$(grep -c ^dn: /tmp/ldif) entries"`,
		Damage: "data.mdb", DamageAt: 2 * 4096, DamageBytes: 16 * 4096,
		Undo: func(int) string {
			return "dn: olcDatabase={1}mdb,cn=config\nchangetype: modify\nreplace: olcReadOnly\nolcReadOnly: FALSE\n\n"
		},
	}
}
